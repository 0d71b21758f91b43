# The checkpoints are not an output: Snakemake would delete them when the job fails or starts again.
rule train:
    input:
        checkpoint=place("megatron", "manifest.json"),
        data=place("data", "manifest.json"),
        gate=place("gate", "parity.json"),
    output:
        manifest=RUNS.place("run") / "train" / "manifest.json",
    log:
        RUNS.log("train"),
    benchmark:
        RUNS.log("train", ".benchmark.tsv")
    retries: train_retries()
    conda:
        "../envs/megaqwen.yaml"
    threads: 1
    resources:
        nodes=1,
        ranks_per_node=ranks_per_node,
        gpus_per_node=0,
        launcher="torchrun",
        try_number=try_number,
        tasks=slurm_tasks,
        slurm_extra=slurm_extra,
        modules="",
        container="",
        container_runtime="apptainer",
        mounts="",
        environment="",
    params:
        launch=launch_command,
        command=rank_command,
        digest=digest_of("train"),
        model=place("model", "hf"),
        checkpoint=place("megatron", "checkpoint"),
        data=place("data"),
        directory=place("run", "train"),
        checkpoints=place("checkpoints"),
    message:
        "train: megatron.training.pretrain on {resources.nodes} node(s) with {resources.ranks_per_node} rank(s) each"
    shell:
        "HF_HUB_OFFLINE=1 {params.launch} --launcher {resources.launcher}"
        " --nodes {resources.nodes} --ranks-per-node {resources.ranks_per_node}"
        " --gpus-per-node {resources.gpus_per_node} --cpus-per-rank {threads}"
        " --modules '{resources.modules}' --environment '{resources.environment}'"
        " --container '{resources.container}' --mounts '{resources.mounts}'"
        " --container-runtime {resources.container_runtime} --log {log}"
        " --checkpoints {params.checkpoints} --try-number {resources.try_number}"
        " --trained-from {input.checkpoint} --trained-from {input.data}"
        " {params.command} --model {params.model}"
        " --checkpoint {params.checkpoint} --data {params.data} --output {params.directory}"
