"""The paper: from the run store to a PDF whose every number and verdict comes from the runs.

`gather` writes what the runs say into a directory: tables (CSV and LaTeX), verdicts, figures, and
where the numbers come from. `typeset` compiles the Typst source in this folder with them, and
`write_results` sums them up for the README. What is missing in the store is missing in the paper,
in a box that says so. Never imports torch.
"""

from repeatlab.report.paper.gathering import Gathered, gather
from repeatlab.report.paper.results import write_results
from repeatlab.report.paper.typesetting import typeset

__all__ = ["Gathered", "gather", "typeset", "write_results"]
