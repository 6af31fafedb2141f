"""The sections of the report with their charts, in the order in which they are read."""

from collections.abc import Sequence

from turntrace.report.charts.endings import dropoff_section, outcome_section
from turntrace.report.charts.errors import errors_section
from turntrace.report.charts.exchanges import latency_section, usage_section
from turntrace.report.charts.journeys import journey_section, retention_section
from turntrace.report.charts.sittings import sessions_section
from turntrace.report.charts.windows import window_section
from turntrace.report.collect import Report
from turntrace.report.figures import Section

__all__ = ["sections"]


def sections(report: Report) -> Sequence[Section]:
    """Return the sections that have charts."""
    return (
        sessions_section(report),
        latency_section(report),
        errors_section(report),
        dropoff_section(report),
        journey_section(report),
        outcome_section(report),
        retention_section(report),
        usage_section(report),
        window_section(report),
    )
