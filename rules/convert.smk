rule convert:
    input:
        model=rules.download.output.manifest,
    output:
        manifest=LAYOUT.megatron / "manifest.json",
    log:
        LOGS / "convert.log",
    benchmark:
        LOGS / "convert.benchmark.tsv"
    conda:
        "../envs/megaqwen.yaml"
    params:
        command=stage_command("convert.py"),
        digest=LAYOUT.stage_digest("convert"),
        model=LAYOUT.model / "hf",
        directory=LAYOUT.megatron,
    message:
        "convert: Hugging Face safetensors to a Megatron torch_dist checkpoint"
    shell:
        "HF_HUB_OFFLINE=1 {params.command}"
        " --model {params.model} --output {params.directory} --log {log}"
