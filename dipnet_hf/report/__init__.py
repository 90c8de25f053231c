"""Reading result files: where a number comes from, tables and plots. Never touches a model."""

from dipnet_hf.report.plots import plot_losses, plot_noise
from dipnet_hf.report.provenance import provenance
from dipnet_hf.report.tables import format_seeds, format_summary

__all__ = ["format_seeds", "format_summary", "plot_losses", "plot_noise", "provenance"]
