"""The free memory of a host or a container."""

from megatron_r1.base.processes import host_memory


def test_a_container_s_limit_counts_where_it_is_lower(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    unlimited = host_memory.free_bytes()
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    (tmp_path / "memory.current").write_text("65536\n")
    (tmp_path / "memory.stat").write_text("anon 9\nactive_file 4096\ninactive_file 8192\n")
    assert host_memory.free_bytes() == (1 << 20) - 65536 + 4096 + 8192 < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.free_bytes() > 1 << 20
