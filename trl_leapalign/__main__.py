"""`python -m trl_leapalign` is the command `trl-leapalign`."""

from .cli.main import main

if __name__ == "__main__":
    main()
