"""The report: one self-contained HTML page."""

from dtrak_jax.report.page import page
from dtrak_jax.report.record import Record, of_run
from dtrak_jax.report.write import write_report

__all__ = ["Record", "of_run", "page", "write_report"]
