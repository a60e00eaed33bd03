"""The throw-away Slurm itself."""


def test_nodes_have_names_and_disks_of_their_own(cluster):
    (cluster.folder / "shared").write_text("seen by both")
    script = f'cat {cluster.folder}/shared; echo " $(hostname) $SLURM_LOCALID $(ls {cluster.local})"'
    cluster.run("srun", "--nodelist=node1", "--nodes=1", "touch", cluster.local / "file")
    done = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "bash", "-c", script)
    assert sorted(line.rstrip() for line in done.stdout.splitlines()) == [
        "seen by both node1 0 file", "seen by both node1 1 file", "seen by both node2 0", "seen by both node2 1",
    ]  # fmt: skip


def test_a_job_that_asks_for_more_than_there_is_is_refused(cluster):
    """Else `sbatch --test-only` would prove nothing."""
    asked = ("sbatch", "--test-only", "--partition", cluster.gpu_partition, "--gpus-per-node=8", "--wrap=true")
    assert cluster.run(*asked, "--nodes=16").returncode == 0
    assert cluster.run(*asked, "--nodes=17", check=False).returncode != 0
    assert cluster.run(*asked[:-2], "--gpus-per-node=9", "--nodes=1", "--wrap=true", check=False).returncode != 0
