"""What edgeprune keeps in the work folder on the device, and how it goes away."""

import os
import shutil
from typing import Any, Callable, Dict

FOLDERS = ("files", "engines", "jobs")
KEPT_JOBS = 20  # the newest job folders, with their logs


def clean(job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Remove sent files, engines and old jobs. Job: "job_folder", kept. Result: "freed_bytes"."""
    freed = 0
    for name in FOLDERS:
        for folder, _, files in os.walk(name):
            if os.path.normpath(folder) == os.path.normpath(job["job_folder"]):
                continue
            for file in files:
                path = os.path.join(folder, file)
                freed += os.path.getsize(path)
                os.unlink(path)
    forget_jobs(job["job_folder"], 1)
    return {"freed_bytes": freed}


def forget_jobs(present: str, kept: int = KEPT_JOBS) -> None:
    """Remove the oldest job folders; never the `present` one."""
    folders = [os.path.join("jobs", name) for name in os.listdir("jobs")]
    folders = sorted((folder for folder in folders if os.path.isdir(folder)), key=os.path.getmtime)
    for folder in folders[: max(len(folders) - kept, 0)]:
        if os.path.normpath(folder) != os.path.normpath(present):
            shutil.rmtree(folder, ignore_errors=True)
