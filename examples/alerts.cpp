// Hear alerts, and take them for somebody: ./alerts [ADDRESS] [NAME]
// g++ -std=c++17 alerts.cpp -lzmq -o alerts   (Debian: apt install libzmq3-dev cppzmq-dev)
#include <iostream>
#include <set>
#include <string>
#include <zmq.hpp>

static std::string text(const std::string& json, const std::string& name) {  // a text of one JSON object; "" if none
    const auto begin = json.find("\"" + name + "\":\"");
    if (begin == std::string::npos) return "";
    const auto first = begin + name.size() + 4;
    return json.substr(first, json.find('"', first) - first);
}

int main(int argc, char** argv) {
    const std::string address = argc > 1 ? argv[1] : "tcp://127.0.0.1:5571", by = argc > 2 ? argv[2] : "";
    zmq::context_t context;
    zmq::socket_t socket(context, zmq::socket_type::dealer);
    socket.set(zmq::sockopt::linger, 0);
    socket.set(zmq::sockopt::rcvtimeo, 3000);
    socket.connect(address);
    std::set<std::string> known;  // alerts come until somebody takes them: what is done is done once for each id
    for (;;) {
        socket.send(zmq::str_buffer(R"({"op":"hello","client":"C++ example","after":0})"), zmq::send_flags::dontwait);
        zmq::message_t frame;
        for (int n = 0; n < 20 && socket.recv(frame); n++) {  // hello again now and then: a restart is survived
            const std::string message = frame.to_string(), id = text(message, "alert_id"), op = text(message, "op");
            if (op == "alert" && text(message, "state") == "open") {
                if (known.insert(id).second) std::cout << text(message, "finding") << ' ' << id << std::endl;
                const std::string ack = R"({"op":"ack","alert_id":")" + id + R"(","by":")" + by + "\"}";
                if (!by.empty()) socket.send(zmq::buffer(ack), zmq::send_flags::dontwait);
            } else if (op == "acknowledged") {
                std::cout << id << " taken by " << text(message, "by") << std::endl;
                if (!by.empty() && text(message, "by") == by) return 0;
            }
        }
    }
}
