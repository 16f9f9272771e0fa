"""A teacher's own chains of thought, kept where the answer is right. Run it again to continue.

python launch/traces.py --config=configs/traces_tiny.py
python launch/traces.py --config=configs/traces_llama3_70b.py --config.openai.base_url=http://gpu-host:8000/v1
"""

from entry import run

if __name__ == "__main__":
    run("traces")
