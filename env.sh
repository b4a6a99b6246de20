# source env.sh - from anywhere, in bash or zsh. Then: dagster job execute -j stage2_training
_fw_root="$(cd "$(dirname "${BASH_SOURCE[0]:-${(%):-%x}}")" && pwd)"
[ -d "$_fw_root/.venv" ] && . "$_fw_root/.venv/bin/activate"
# Absolute, as Dagster demands; FW_DAGSTER_HOME puts the instance elsewhere.
export DAGSTER_HOME="${FW_DAGSTER_HOME:-$_fw_root/dagster_home}"
# For `dagster job execute` alone. DAGSTER_MODULE_NAME would do it too, but it breaks `dagster dev`.
export DAGSTER_CLI_JOB_EXECUTE_MODULE_NAME=fw_pipeline.definitions
# Idle CPU threads sleep instead of spinning. Spinning doubles to quadruples the CPU time of small tensors when anything else
# runs (a plane sweep of 6 frames on 2 cores: 2.8 CPU seconds asleep, 4.7 to 11 spinning) and gains nothing.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
unset _fw_root
