"""Engines: built here, kept by key, and never loaded where the key does not fit."""

import hashlib
import json
import os
import time
from typing import Any, Callable, Dict, List

from . import system
from .backend import Backend, Runner, open_backend
from .errors import AgentError
from .files import read_json, sha256_of, verified, write_json

FOLDER = "engines"
KEY_FIELDS = (
    "model_sha256",
    "backend",
    "backend_version",
    "device",
    "compute_capability",
    "precision",
    "options",
)


def _identity(backend: Backend) -> Dict[str, Any]:
    """The part of an engine's key that this device decides."""
    found = backend.probe()
    return {
        "backend": backend.name,
        "backend_version": found["version"],
        "device": system.board(),
        "compute_capability": found.get("compute_capability"),
    }


def _key(fields: Dict[str, Any]) -> str:
    text = json.dumps({name: fields[name] for name in KEY_FIELDS}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def build(job: Dict[str, Any], report: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Build an engine, or find it built.

    Job: "model" (file reference), "backend", "precision", "options". Result: the engine's record:
    `KEY_FIELDS`, "key", "path", "sha256", "size_bytes", "build_s", "log" (list of lines), "memory_mib" (of
    `Backend.memory_mib`), "reused".

    Raises:
        AgentError: If the model cannot be built here.
    """
    model = verified(job["model"])
    backend = open_backend(job["backend"])
    fields = dict(
        _identity(backend),
        model_sha256=job["model"]["sha256"],
        precision=job["precision"],
        options=job["options"],
    )
    key = _key(fields)
    os.makedirs(FOLDER, exist_ok=True)
    path, record_path = os.path.join(FOLDER, key + ".engine"), os.path.join(FOLDER, key + ".json")
    if os.path.isfile(path) and os.path.isfile(record_path):
        record = _record(record_path)
        whole = "memory_mib" in record  # the record of an earlier version is not
        if whole and record.get("key") == key and record.get("sha256") == sha256_of(path):
            return dict(record, reused=True)

    report({"event": "build", "precision": job["precision"]})
    log: List[str] = []
    temporary = "{}.{}.tmp".format(path, os.getpid())
    start = time.perf_counter()
    try:
        backend.build(model, temporary, job["precision"], job["options"], log.append)
        build_s = time.perf_counter() - start
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    record = dict(
        fields,
        key=key,
        path=path,
        sha256=sha256_of(path),
        size_bytes=os.path.getsize(path),
        build_s=build_s,
        log=log,
        memory_mib=backend.memory_mib(path, job["options"]),
        reused=False,
    )
    write_json(record_path, record)
    return record


def _record(path: str) -> Dict[str, Any]:
    try:
        record = read_json(path)
    except AgentError:
        return {}  # a damaged record is no record: the engine is built again
    return record if isinstance(record, dict) else {}


def load(engine: Dict[str, Any]) -> Runner:
    """Load an engine for inference after checking that its record describes it and fits this device.

    Raises:
        AgentError: If the file differs from its record, or was built for another device, runtime or setting.
    """
    path = verified(engine)
    backend = open_backend(engine["backend"])
    here = _identity(backend)
    for name, value in here.items():
        if engine[name] != value:
            message = "the engine was built for {} {!r}; here it is {!r}".format(name, engine[name], value)
            raise AgentError("engine", message, "build it again on this device")
    if _key(engine) != engine["key"]:
        raise AgentError(
            "engine", "the engine's record does not match its key", "build it again on this device"
        )
    return backend.load(path, engine["options"])
