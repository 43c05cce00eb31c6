"""`python -m beit_fast <command>`, the same as `beit-fast <command>`."""

from beit_fast.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
