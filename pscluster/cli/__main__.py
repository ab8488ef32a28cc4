"""`python -m pscluster.cli` is psctl."""

from pscluster.cli.main import main

if __name__ == "__main__":
    main()
