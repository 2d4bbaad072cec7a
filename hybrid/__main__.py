"""`python -m hybrid` is the `hybrid` command, for launchers that start modules (torchrun -m hybrid …)."""

from hybrid.commands import main

if __name__ == "__main__":
    main()
