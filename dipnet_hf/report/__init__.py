"""Reading result files: where a number comes from, tables and plots. Never touches a model."""

from dipnet_hf.report.plots import plot_losses, plot_noise, plot_noise_level
from dipnet_hf.report.provenance import provenance
from dipnet_hf.report.tables import format_seeds, format_spreads, format_summary
from dipnet_hf.report.uncertainty_plots import (
    plot_against_samples,
    plot_reliability,
    plot_risk_coverage,
    plot_tokens,
    write_tokens_html,
)

__all__ = [
    "format_seeds",
    "format_spreads",
    "format_summary",
    "plot_against_samples",
    "plot_losses",
    "plot_noise",
    "plot_noise_level",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_tokens",
    "provenance",
    "write_tokens_html",
]
