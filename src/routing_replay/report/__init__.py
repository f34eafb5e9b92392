"""The audit of a trainer against a rollout."""

from routing_replay.report.audit import AuditResult, AuditSample, Comparison, audit

__all__ = ["AuditResult", "AuditSample", "Comparison", "audit"]
