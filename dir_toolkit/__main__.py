"""``python -m dir_toolkit`` is the command ``dir-toolkit``."""

from .experiment.command import main

if __name__ == "__main__":
    main()
