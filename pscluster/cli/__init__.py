"""psctl. Imports only click and the standard library until a verb needs more: `psctl --help` is instant."""
