"""The report: all figures of the ledger as one HTML page, as a file or served on this machine.

::

    from turntrace.ledger import Ledger
    from turntrace.report import write_report

    write_report(Ledger("sqlite:///ledger.db"), "report.html")
"""

from turntrace.report.collect import Report, collect
from turntrace.report.langfuse import LangfusePlace
from turntrace.report.page import render
from turntrace.report.serving import ReportServer, serve
from turntrace.report.writing import write_report

__all__ = ["LangfusePlace", "Report", "ReportServer", "collect", "render", "serve", "write_report"]
