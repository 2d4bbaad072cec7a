"""`python -m hybrid` is the `hybrid` command, as `torchrun -m` needs it."""

from hybrid.commands import main

if __name__ == "__main__":
    main()
