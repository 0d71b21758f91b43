rule parity:
    input:
        of_each_run(RUNS.place("run") / "parity" / "convert" / "parity.json"),
        of_each_run(RUNS.place("run") / "parity" / "export" / "parity.json"),


rule parity_convert:
    input:
        checkpoint=place("megatron", "manifest.json"),
        data=place("data", "manifest.json"),
        gate=place("gate", "parity.json"),
    output:
        verdict=RUNS.place("run") / "parity" / "convert" / "parity.json",
    log:
        RUNS.log("parity_convert"),
    benchmark:
        RUNS.log("parity_convert", ".benchmark.tsv")
    conda:
        "../envs/megaqwen.yaml"
    threads: 1
    resources:
        nodes=parity_nodes("parity_convert"),
        ranks_per_node=parity_ranks_per_node("parity_convert"),
        tasks=parity_ranks,
        slurm_extra=parity_extra("parity_convert"),
        gpus_per_node=0,
        launcher="torchrun",
        environment="",
    params:
        launch=parity_launch,
        command=parity_command,
        digest=digest_of("parity"),
        model=place("model", "hf"),
        checkpoint=place("megatron", "checkpoint"),
        data=place("data"),
    message:
        "parity after convert: the gate's verdict, measured again where parity has changed"
    shell:
        "HF_HUB_OFFLINE=1 {params.launch} --launcher {resources.launcher}"
        " --nodes {resources.nodes} --ranks-per-node {resources.ranks_per_node}"
        " --gpus-per-node {resources.gpus_per_node} --cpus-per-rank {threads}"
        " --environment '{resources.environment}' --log {log}"
        " {params.command} --crossing convert"
        " --model {params.model} --checkpoint {params.checkpoint} --gate {input.gate}"
        " --checkpoint-manifest {input.checkpoint} --data {params.data}"
        " --output {output.verdict}"


rule parity_export:
    input:
        checkpoint=rules.train.output.manifest,
        model=rules.export.output.manifest,
        data=place("data", "manifest.json"),
    output:
        verdict=RUNS.place("run") / "parity" / "export" / "parity.json",
    log:
        RUNS.log("parity_export"),
    benchmark:
        RUNS.log("parity_export", ".benchmark.tsv")
    conda:
        "../envs/megaqwen.yaml"
    threads: 1
    resources:
        nodes=parity_nodes("parity_export"),
        ranks_per_node=parity_ranks_per_node("parity_export"),
        tasks=parity_ranks,
        slurm_extra=parity_extra("parity_export"),
        gpus_per_node=0,
        launcher="torchrun",
        environment="",
    params:
        launch=parity_launch,
        command=parity_command,
        digest=digest_of("parity"),
        model=place("run", "export", "hf"),
        checkpoint=place("checkpoints"),
        data=place("data"),
    message:
        "parity gate: is the exported model the trained checkpoint?"
    shell:
        "HF_HUB_OFFLINE=1 {params.launch} --launcher {resources.launcher}"
        " --nodes {resources.nodes} --ranks-per-node {resources.ranks_per_node}"
        " --gpus-per-node {resources.gpus_per_node} --cpus-per-rank {threads}"
        " --environment '{resources.environment}' --log {log}"
        " {params.command} --crossing export"
        " --model {params.model} --checkpoint {params.checkpoint}"
        " --checkpoint-manifest {input.checkpoint} --data {params.data}"
        " --output {output.verdict}"
