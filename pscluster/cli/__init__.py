"""psctl. Only click and the standard library are imported until a verb needs more: `psctl --help` is instant."""
