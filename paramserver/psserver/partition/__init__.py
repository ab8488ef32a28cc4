"""One partition process: gate, vote, commit, optimizer, snapshots of one slice of one job."""
