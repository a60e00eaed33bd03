# The image of a GPU node: a CUDA build of PyTorch, by build argument, and what requirements/gpu.sh adds to it, all of it pinned.
#   docker build --tag megatron-nft .                     # or with --build-arg BASE=an image with torch 2.13.0, CUDA 13, Python 3.12 and nvcc
#   enroot import --output megatron-nft.sqsh dockerd://megatron-nft
# vLLM's wheel is compiled against one version of torch. An image with another one (NVIDIA's pytorch images carry builds between versions) is
# refused in one line: with such a base vLLM has to be compiled from source.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
FROM ${BASE}

# MAX_JOBS: compilers that run side by side; each takes some 4 GB
ARG MAX_JOBS=8
ENV PIP_BREAK_SYSTEM_PACKAGES=1
COPY requirements/gpu.in requirements/gpu.txt requirements/gpu.sh /opt/megatron_nft/requirements/
RUN MAX_JOBS=${MAX_JOBS} bash /opt/megatron_nft/requirements/gpu.sh

# After the packages, which take half an hour and are kept when only this changes.
COPY setup.py pyproject.toml README.md LICENSE /opt/megatron_nft/
COPY megatron_nft /opt/megatron_nft/megatron_nft
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation /opt/megatron_nft && python3 -m megatron_nft --help > /dev/null

# Pyxis and Enroot run it as the user who submitted: nothing in it is written to, and the checkout that slurm/job.sh mounts goes before the copy
# inside. No entry point of the base's, so that `srun --container-image` runs the command it is given.
WORKDIR /workspace
RUN chmod 1777 /workspace
ENTRYPOINT []
CMD ["bash"]
