# make_environment FOLDER PYTHON [EXTRA]: a virtual environment with jaxre in it, made again when pyproject.toml changes.
make_environment() {
  local folder=$1 python=$2 extra=${3:-}
  local stamp="$folder/.installed-${extra:-plain}"
  if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp"; then
    return
  fi
  [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
  echo "installing jaxre${extra:+ with its $extra extra} into $folder (a few minutes the first time)" >&2
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
  cp pyproject.toml "$stamp"
}
