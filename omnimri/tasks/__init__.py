"""One ability per file: target, head, loss and read-out together."""

from .detect import Detect
from .reconstruct import Reconstruct
from .report import Report
from .segment import Segment
from .task import Task

TASKS: dict[str, Task] = {t.name: t for t in (Reconstruct(), Segment(), Detect(), Report())}

__all__ = ["TASKS", "Detect", "Reconstruct", "Report", "Segment", "Task"]
