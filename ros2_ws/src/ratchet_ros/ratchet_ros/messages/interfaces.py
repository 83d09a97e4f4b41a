"""What a message type is called, and its definition in words as bags carry it.

Knows the .msg files of the environment. Knows no message and no node.
"""

from __future__ import annotations

from typing import Any

from ratchet_ros.messages import dds

SEPARATOR = "=" * 80


def type_name(kind: type[Any]) -> str:
    """`sensor_msgs/msg/Image` for a message class."""
    package, part = kind.__module__.split(".")[:2]
    return f"{package}/{part}/{kind.__name__}"


def definition(name: str) -> str:
    """The .msg text of a type with those it is made of, in the layout that MCAP calls ros2msg."""
    parts, seen, todo = [], {name}, [name]
    while todo:
        current = todo.pop(0)
        package, _, stem = current.partition("/msg/")
        text = (dds.share(package) / "msg" / f"{stem}.msg").read_text()
        short = f"{package}/{stem}"
        parts.append(text if current == name else f"{SEPARATOR}\nMSG: {short}\n{text}")
        for line in text.splitlines():
            word = line.split("#")[0].strip().split(" ")[0].split("[")[0].split("<")[0]
            if "/" in word:
                found = word if "/msg/" in word else word.replace("/", "/msg/", 1)
            elif word[:1].isupper():
                found = f"{package}/msg/{word}"
            else:
                continue
            if found not in seen:
                seen.add(found)
                todo.append(found)
    return "\n".join(parts)
