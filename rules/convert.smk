rule convert:
    input:
        model=rules.download.output.manifest,
    output:
        manifest=LAYOUT.megatron / "manifest.json",
    params:
        digest=LAYOUT.stage_digest("convert"),
        model=LAYOUT.model / "hf",
        directory=LAYOUT.megatron,
    log:
        LOGS / "convert.log",
    benchmark:
        LOGS / "convert.benchmark.tsv"
    message:
        "convert: Hugging Face safetensors to a Megatron torch_dist checkpoint"
    shell:
        "HF_HUB_OFFLINE=1 {PYTHON} {SCRIPTS}/convert.py --config {RUN_CONFIG}"
        " --model {params.model} --output {params.directory} --log {log}"
