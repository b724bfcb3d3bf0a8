"""An OCI bundle for crun that runs an image as strictly as a cluster would.

Entry point, command, environment and user are the image's own; everything around them is locked:
read-only root, no capabilities, no new privileges, namespaces of its own, an empty network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
TIGHT = ["nosuid", "nodev", "noexec"]


def specification(image: dict[str, Any], root: Path, *, uid: int, tmp: bool) -> dict[str, Any]:
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": TIGHT},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "noexec", "mode=755", "size=64k"],
        },
    ]
    if tmp:
        mounts.append(
            {
                "destination": "/tmp",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": [*TIGHT, "mode=1777", "size=64m"],
            }
        )
    return {
        "ociVersion": "1.0.2",
        "hostname": "momaserve",
        "root": {"path": str(root), "readonly": True},
        "process": {
            "args": [*image["Entrypoint"], *image["Cmd"]],
            "env": image["Env"],
            "cwd": image.get("WorkingDir") or "/",
            "user": {"uid": uid, "gid": uid},
            "capabilities": {name: [] for name in CAPABILITY_SETS},
            "noNewPrivileges": True,
        },
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/bus", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path, help="what `buildah inspect` says of the image")
    parser.add_argument("root", type=Path, help="where the image's file system is mounted")
    parser.add_argument("bundle", type=Path, help="directory that gets config.json")
    parser.add_argument("--uid", type=int, help="another user than the image's")
    parser.add_argument("--tmp", action="store_true", help="a writable /tmp in memory")
    args = parser.parse_args()
    image = json.loads(args.image.read_text())["Docker"]["config"]
    uid = args.uid if args.uid is not None else int(image["User"].split(":")[0])
    wanted = specification(image, args.root, uid=uid, tmp=args.tmp)
    (args.bundle / "config.json").write_text(json.dumps(wanted))


if __name__ == "__main__":
    main()
