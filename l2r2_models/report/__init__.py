"""Reports: self-contained HTML pages of evaluations, audits and explanations."""
