"""The report: one self-contained HTML page."""

from dtrak_jax.report.page import page

__all__ = ["page"]
