def write_preparation(folder): return []
