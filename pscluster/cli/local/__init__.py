"""The local cluster: real daemons as processes of this user, under one state directory."""
