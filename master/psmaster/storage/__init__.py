"""What the master keeps on disk: the database, logs, metrics, bundles, manifests."""
