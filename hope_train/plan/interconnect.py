"""Links between devices, from their vendors' data sheets, and which of them a dimension of the mesh uses (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from hope_train.config.mesh import MeshSizes
from hope_train.errors import UserError
from hope_train.plan.devices import Device, nearest


@dataclass(frozen=True)
class Link:
    """What one device can send (and receive at the same time)."""

    name: str
    title: str
    bandwidth: float
    """Bytes per second in one direction and per device."""

    latency: float
    """Seconds that a collective over it takes besides its bytes. Ours: an assumption, no data sheet has it."""

    node: int | None = None
    """Devices that it joins; None: a network between nodes."""


def _inside(name: str, title: str, gb_per_s: float, node: int) -> Link:
    return Link(name, title, gb_per_s * 1e9, 10e-6, node)


def _between(name: str, title: str, gbit_per_s: float) -> Link:
    return Link(name, title, gbit_per_s / 8 * 1e9, 25e-6)


_LINKS = (
    # NVIDIA data sheets give both directions together: A100 600 GB/s, H100 and H200 900 GB/s, B200 1.8 TB/s.
    _inside("nvlink3", "NVLink 3, 8 devices", 300, 8),
    _inside("nvlink4", "NVLink 4, 8 devices", 450, 8),
    _inside("nvlink5", "NVLink 5, 8 devices", 900, 8),
    # NVIDIA GB200 NVL72: the same links over 72 devices.
    _inside("nvl72", "NVLink 5, 72 devices", 900, 72),
    # AMD MI300X data sheet: seven Infinity Fabric links of 128 GB/s in both directions together.
    _inside("xgmi", "Infinity Fabric, 8 devices", 448, 8),
    # PCI-SIG, 16 lanes: 16 and 32 GT/s with 128b/130b coding.
    _inside("pcie4", "PCI Express 4.0 x16, 8 devices", 31.5, 8),
    _inside("pcie5", "PCI Express 5.0 x16, 8 devices", 63, 8),
    # Not a data sheet: what processes pass each other through one CPU's memory.
    _inside("shared-memory", "memory of one computer, 64 processes", 5, 64),
    # InfiniBand Trade Association, 4 lanes; one port per device, as in the vendors' eight-device systems.
    _between("ib-hdr", "InfiniBand HDR, one 200 Gbit/s port per device", 200),
    _between("ib-ndr", "InfiniBand NDR, one 400 Gbit/s port per device", 400),
    _between("ib-xdr", "InfiniBand XDR, one 800 Gbit/s port per device", 800),
    # IEEE 802.3: RoCE with a port per device, or one port that the eight devices of a node share.
    _between("roce-400", "Ethernet, one 400 Gbit/s port per device", 400),
    _between("ethernet-100", "Ethernet, one 100 Gbit/s port shared by 8 devices", 100 / 8),
    _between("ethernet-25", "Ethernet, one 25 Gbit/s port shared by 8 devices", 25 / 8),
)
LINKS: dict[str, Link] = {link.name: link for link in _LINKS}

_DEFAULTS = {
    "b200": ("nvlink5", "ib-ndr"),
    "h200": ("nvlink4", "ib-ndr"),
    "gh200": ("nvlink4", "ib-ndr"),
    "h100": ("nvlink4", "ib-ndr"),
    "h100-pcie": ("pcie5", "ib-ndr"),
    "a100-80": ("nvlink3", "ib-hdr"),
    "a100-40": ("nvlink3", "ib-hdr"),
    "mi300x": ("xgmi", "ib-ndr"),
    "cpu": ("shared-memory", "ethernet-25"),
}


@dataclass(frozen=True)
class Interconnect:
    """Links inside a node and between nodes."""

    inside: Link
    between: Link

    @property
    def name(self) -> str:
        """As `--interconnect` takes it."""
        return f"{self.inside.name}+{self.between.name}"

    @property
    def node(self) -> int:
        """Devices of a node."""
        return self.inside.node or 1

    def link(self, mesh: MeshSizes, dim: str) -> Link:
        """The slowest link that a group along `dim` needs.

        tp ranks are neighbours, then dp_shard, dp_replicate, pp: a group stays inside a node when all ranks up to its
        dimension fill a node or a whole fraction of one.
        """
        span = 1
        for name in ("tp", "dp_shard", "dp_replicate", "pp"):
            span *= getattr(mesh, name)
            if name == dim:
                break
        inside = span <= self.node and (mesh.world <= self.node or self.node % span == 0)
        return self.inside if inside else self.between


def find_interconnect(name: str | None, device: Device) -> Interconnect:
    """The interconnect called `name`: `nvlink4+ib-ndr`, or one half of it; None: what the device usually comes with.

    Raises UserError with the nearest names for a link that is not listed, or two for the same place.
    """
    inside, between = (LINKS[link] for link in _DEFAULTS.get(device.name, ("pcie4", "ethernet-100")))
    given: set[bool] = set()
    for word in (name or "").lower().replace("_", "-").split("+") if name is not None else ():
        link = LINKS.get(word.strip())
        if link is None:
            hint = nearest(word.strip(), LINKS)
            raise UserError(f"unknown interconnect {name!r}: {hint}known are {', '.join(LINKS)}, or two joined by +")
        local = link.node is not None
        if local in given:
            where = "inside a node" if local else "between nodes"
            raise UserError(f"interconnect {name!r} names two links {where}: join one inside a node and one between")
        given.add(local)
        if local:
            inside = link
        else:
            between = link
    return Interconnect(inside, between)
