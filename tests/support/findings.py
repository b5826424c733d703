"""Findings of the doctor by subject."""

from collections.abc import Iterable

from kdjax.doctor.findings import ERROR, Finding


def errors(findings: Iterable[Finding]) -> dict[str, str]:
    """The messages of the errors by subject."""
    return {finding.subject: finding.message for finding in findings if finding.level == ERROR}
