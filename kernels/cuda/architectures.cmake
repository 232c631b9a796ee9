# Which architectures the CUDA kernels are built for, unless GKT_CUDA_ARCHS names others.

# The version of an nvcc, as "12.8"; empty where it doesn't say.
function(gkt_nvcc_version nvcc result)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${text}")
  set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()

# What an nvcc of that version knows, of A100 (80), H100 (90), B200 (100) and RTX 50 (120): machine code for each, and
# PTX of the newest for GPUs that come later.
function(gkt_cuda_architectures version result)
  set(known 80)
  if(version VERSION_GREATER_EQUAL 11.8)
    list(APPEND known 90)
  endif()
  if(version VERSION_GREATER_EQUAL 12.8)
    list(APPEND known 100 120)
  endif()
  list(POP_BACK known newest)
  list(TRANSFORM known APPEND "-real")
  set(${result} ${known} ${newest} PARENT_SCOPE)
endfunction()

# How many nvcc may run at once: each takes up to 2 GiB with its architectures side by side, and machines with many
# cores have less per core.
function(gkt_nvcc_jobs result)
  cmake_host_system_information(RESULT mebibytes QUERY AVAILABLE_PHYSICAL_MEMORY)
  math(EXPR jobs "${mebibytes} / 2048")
  if(jobs LESS 1)
    set(jobs 1)
  endif()
  set(${result} ${jobs} PARENT_SCOPE)
endfunction()
