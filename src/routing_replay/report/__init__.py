"""The audit of a trainer against a rollout, as figures, tables and one HTML page."""

from routing_replay.report.audit import audit
from routing_replay.report.figures import audit_notes
from routing_replay.report.html import render_html
from routing_replay.report.results import AuditDetails, AuditResult, AuditSample, Comparison
from routing_replay.report.terminal import audit_tables

__all__ = [
    "AuditDetails",
    "AuditResult",
    "AuditSample",
    "Comparison",
    "audit",
    "audit_notes",
    "audit_tables",
    "render_html",
]
