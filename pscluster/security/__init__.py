"""Certificates of a cluster's members: its authority, identities, credentials, TLS contexts, join tokens."""
