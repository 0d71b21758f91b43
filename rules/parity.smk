rule parity:
    input:
        LAYOUT.run / "parity" / "convert" / "parity.json",
        LAYOUT.run / "parity" / "export" / "parity.json",


rule parity_convert:
    input:
        checkpoint=rules.convert.output.manifest,
        data=rules.preprocess.output.manifest,
        gate=rules.parity_gate.output.verdict,
    output:
        verdict=LAYOUT.run / "parity" / "convert" / "parity.json",
    log:
        LOGS / "parity_convert.log",
    benchmark:
        LOGS / "parity_convert.benchmark.tsv"
    conda:
        "../envs/megaqwen.yaml"
    threads: 1
    resources:
        nodes=parity_nodes("parity_convert"),
        ranks_per_node=parity_ranks_per_node("parity_convert"),
        tasks=parity_ranks,
        slurm_extra=parity_extra("parity_convert"),
        launcher="torchrun",
        environment="",
    params:
        launch=parity_launch,
        command=parity_command,
        digest=LAYOUT.stage_digest("parity"),
        model=LAYOUT.model / "hf",
        checkpoint=LAYOUT.megatron / "checkpoint",
        data=LAYOUT.data,
    message:
        "parity after convert: the gate's verdict, measured again where parity has changed"
    shell:
        "HF_HUB_OFFLINE=1 {params.launch} --launcher {resources.launcher}"
        " --nodes {resources.nodes} --ranks-per-node {resources.ranks_per_node}"
        " --cpus-per-rank {threads} --environment '{resources.environment}' --log {log}"
        " {params.command} --crossing convert"
        " --model {params.model} --checkpoint {params.checkpoint} --gate {input.gate}"
        " --checkpoint-manifest {input.checkpoint} --data {params.data}"
        " --output {output.verdict}"


rule parity_export:
    input:
        checkpoint=rules.train.output.manifest,
        model=rules.export.output.manifest,
        data=rules.preprocess.output.manifest,
    output:
        verdict=LAYOUT.run / "parity" / "export" / "parity.json",
    log:
        LOGS / "parity_export.log",
    benchmark:
        LOGS / "parity_export.benchmark.tsv"
    conda:
        "../envs/megaqwen.yaml"
    threads: 1
    resources:
        nodes=parity_nodes("parity_export"),
        ranks_per_node=parity_ranks_per_node("parity_export"),
        tasks=parity_ranks,
        slurm_extra=parity_extra("parity_export"),
        launcher="torchrun",
        environment="",
    params:
        launch=parity_launch,
        command=parity_command,
        digest=LAYOUT.stage_digest("parity"),
        model=LAYOUT.run / "export" / "hf",
        checkpoint=LAYOUT.checkpoints,
        data=LAYOUT.data,
    message:
        "parity gate: is the exported model the trained checkpoint?"
    shell:
        "HF_HUB_OFFLINE=1 {params.launch} --launcher {resources.launcher}"
        " --nodes {resources.nodes} --ranks-per-node {resources.ranks_per_node}"
        " --cpus-per-rank {threads} --environment '{resources.environment}' --log {log}"
        " {params.command} --crossing export"
        " --model {params.model} --checkpoint {params.checkpoint}"
        " --checkpoint-manifest {input.checkpoint} --data {params.data}"
        " --output {output.verdict}"
