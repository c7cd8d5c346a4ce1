"""Quality of answers by bits per expert weight, experts per token and constraint, on held-out data: docs/quality.md."""
