"""The audit of a trainer against a rollout, as figures, tables and one HTML page."""

from routing_replay.report.audit import (
    AuditDetails,
    AuditResult,
    AuditSample,
    Comparison,
    audit,
)
from routing_replay.report.html import render_html
from routing_replay.report.terminal import audit_tables

__all__ = [
    "AuditDetails",
    "AuditResult",
    "AuditSample",
    "Comparison",
    "audit",
    "audit_tables",
    "render_html",
]
