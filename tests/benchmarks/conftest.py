import sys
from pathlib import Path

# The benchmarks are scripts; their parts are imported as they import each other.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
