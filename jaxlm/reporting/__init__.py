"""How a run is shown: claims, tables, figures and one self-contained HTML page, from its folder alone."""

from jaxlm.reporting.report import Claim, Figure, Report, Sample, Series, Table

__all__ = ["Claim", "Figure", "Report", "Sample", "Series", "Table"]
