"""A host for tests of the pool: over a real connection it reports the ordered engines as
running, but runs nothing."""

from megatron_r1.engines.fleet.host import HostLink
from megatron_r1.engines.fleet.host_messages import EngineOrder, EngineReport, HostReport

COORDINATOR = "10.0.0.1:4711"


class ScriptedHost:
    """`turn()` receives and reports once; without turns it is silent; `close()` disconnects."""

    def __init__(self, pool, token, name, num_engines=1):
        self.link = HostLink(f"tcp://127.0.0.1:{pool.port}", token)
        self.name, self.num_engines = name, num_engines
        self.orders: dict[str, EngineOrder] = {}
        """By the name of the engine: what it was ordered last."""
        self.ends: dict[str, str] = {}
        """By the name of the engine: how its part here ended."""

    def turn(self):
        orders = self.link.receive(0.02)
        if orders is not None:
            self.orders = {order.engine: order for order in orders.engines}
        reports = [self._report(order) for order in self.orders.values()]
        self.link.send(HostReport(self.name, self.num_engines, "", reports))

    def close(self):
        self.link.close()

    def _report(self, order):
        if order.engine in self.ends:
            return EngineReport(order.engine, "ended", end_reason=self.ends[order.engine])
        first = order.part is None or order.part.serves
        coordinator = COORDINATOR if order.part is not None and first else ""
        url = f"http://{self.name}:1" if first else ""
        return EngineReport(order.engine, "running", url=url, coordinator=coordinator)
