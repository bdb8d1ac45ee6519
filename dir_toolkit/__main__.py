"""``python -m dir_toolkit`` is the command ``dir-toolkit``."""

from dir_toolkit_recipes import main

if __name__ == "__main__":
    main()
