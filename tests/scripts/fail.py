"""Fails at once, and says in which attempt and where the workers were to meet."""

import os
import sys

# In one piece: two workers write to the same file.
sys.stdout.write(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']} port {os.environ['MASTER_PORT']}\n")
sys.stdout.flush()
sys.exit(7)
