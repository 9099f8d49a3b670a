// Runs an AOTInductor package on one float32 input of any shape, and proves that no Python is in the process.
//
//     loader PACKAGE.pt2 INPUT OUTPUT SIZE...      INPUT and OUTPUT are raw float32
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
    std::vector<int64_t> shape;
    for (int i = 4; i < argc; ++i) shape.push_back(std::stoll(argv[i]));
    at::Tensor x = at::empty(shape, at::kFloat);
    std::ifstream(argv[2], std::ios::binary).read(static_cast<char*>(x.data_ptr()), x.nbytes());

    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    at::Tensor y = model.run({x}).at(0).contiguous();
    std::ofstream(argv[3], std::ios::binary).write(static_cast<char*>(y.data_ptr()), y.nbytes());

    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        if (line.find("libpython") != std::string::npos || line.find("torch_python") != std::string::npos) {
            std::cerr << "Python is loaded: " << line << "\n";
            return 1;
        }
    }
    std::cout << "no Python\n";
}
