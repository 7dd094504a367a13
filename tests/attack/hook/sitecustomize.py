"""With this folder on PYTHONPATH, every Python process of a command counts its file-system events (killed.py)."""

import os

if "ATTACK_FOLDER" in os.environ:
    from tests.attack.killed import install

    install()
