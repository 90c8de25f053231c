"""Reading result files: where a number comes from, tables and plots. Never touches a model."""

from report.diagnosis import draw_diagnosis, format_diagnosis
from report.plots import plot_losses, plot_noise, plot_noise_level
from report.provenance import provenance
from report.tables import format_seeds, format_spreads, format_summary
from report.uncertainty_plots import (
    plot_against_samples,
    plot_reliability,
    plot_risk_coverage,
    plot_tokens,
    write_tokens_html,
)

__all__ = [
    "draw_diagnosis",
    "format_diagnosis",
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
