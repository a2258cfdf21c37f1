import torch

from entropylens.capture.device import DeviceClock, allocated_bytes, resident_bytes


class Event:
    """Plays an accelerator's timing event on a clock that the test moves."""

    now = 0.0
    passed = True

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return Event.passed

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_device_time_is_summed_once_it_has_passed() -> None:
    clock = DeviceClock(torch.device("cpu"), Event)
    for milliseconds in (5.0, 7.0):
        clock.start()
        Event.now += milliseconds
        clock.stop()
        Event.now += 100.0
    Event.passed = False
    assert clock.collect() == 0.0
    Event.passed = True
    assert clock.collect() == 0.012
    assert clock.collect() == 0.0


def test_a_cpu_has_no_device_time() -> None:
    clock = DeviceClock(torch.device("cpu"))
    clock.start()
    clock.stop()
    assert clock.collect() == 0.0
    assert allocated_bytes(torch.device("cpu")) is None


def test_resident_memory_grows_with_what_is_allocated() -> None:
    before = resident_bytes()
    held = torch.ones(20_000_000)
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before > 0.9 * held.numel() * 4
