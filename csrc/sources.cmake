# SPDX-License-Identifier: Apache-2.0
# The one list of C++ and CUDA sources, and what they are compiled as. Sources are found, never named: a family is whatever
# csrc/ops/<family>.cpp there is, with csrc/{policy,cpu}/<family>.cpp and csrc/cuda/<family>/*.cu beside it.
# CMakeLists.txt includes this; `cmake -P csrc/sources.cmake` prints it for those who compile apart from it
# (tools/sources.py), a line each:   std 20   and   kind family architecture path, with - for none.
if(CMAKE_SCRIPT_MODE_FILE)
  cmake_minimum_required(VERSION 3.26)
else()
  set(depends CONFIGURE_DEPENDS)  # a new file is seen at the next build
endif()
set(LRK_STANDARD 20)  # of C++, host and device

get_filename_component(LRK_ROOT "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)

# LRK_SOURCES: kind|family|architecture|path. A <...>smXX.cu is of architecture XX, every other source of all.
set(LRK_SOURCES "")
set(LRK_FAMILIES "")
foreach(kind ops policy cpu cuda)
  set(suffix cpp)
  if(kind STREQUAL "cuda")
    set(suffix cu)
  endif()
  file(GLOB_RECURSE found RELATIVE "${LRK_ROOT}" ${depends} "${LRK_ROOT}/csrc/${kind}/*.${suffix}")
  foreach(path IN LISTS found)
    get_filename_component(name "${path}" NAME_WE)
    get_filename_component(folder "${path}" DIRECTORY)
    if(NOT folder STREQUAL "csrc/${kind}")  # of a family's folder
      get_filename_component(family "${folder}" NAME)
    elseif(kind STREQUAL "ops" AND NOT name STREQUAL "library")
      set(family "${name}")
      list(APPEND LRK_FAMILIES "${family}")
    elseif(name IN_LIST LRK_FAMILIES)
      set(family "${name}")
    else()  # library.cpp and whatever else the families of a kind share
      set(family "-")
    endif()
    set(arch "-")
    if(kind STREQUAL "cuda" AND name MATCHES "(^|_)sm([0-9]+)$")
      set(arch "${CMAKE_MATCH_2}")
    endif()
    list(APPEND LRK_SOURCES "${kind}|${family}|${arch}|${path}")
  endforeach()
endforeach()

# A family has all four kinds, or its contract says why not:   // no cuda: ...
foreach(family IN LISTS LRK_FAMILIES)
  file(STRINGS "${LRK_ROOT}/csrc/${family}.h" excused REGEX "^// no [a-z]+: .")
  foreach(kind policy cpu cuda)
    if(NOT "${LRK_SOURCES}" MATCHES "(^|;)${kind}[|]${family}[|]-" AND NOT "${excused}" MATCHES "// no ${kind}:")
      message(FATAL_ERROR "lrkern: family ${family} has no source in csrc/${kind}, and csrc/${family}.h has no line '// no ${kind}: <why>'")
    endif()
  endforeach()
endforeach()

# The paths of those sources that `regex` fits from the start on, such as "cuda[|].*[|]-[|]".
function(lrk_sources out regex)
  set(paths "${LRK_SOURCES}")
  list(FILTER paths INCLUDE REGEX "^${regex}")
  list(TRANSFORM paths REPLACE ".*[|]" "")
  set(${out} "${paths}" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  list(JOIN LRK_SOURCES "\n" lines)
  string(REPLACE "|" " " lines "${lines}")
  execute_process(COMMAND "${CMAKE_COMMAND}" -E echo "std ${LRK_STANDARD}\n${lines}")
endif()
